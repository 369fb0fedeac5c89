// A node service of the lab: kept HTTP connections, streams of events, websockets, work in a thread and in the pool.
// Arguments: address, port, a file to write to.
const crypto = require("crypto");
const fs = require("fs");
const http = require("http");
const { Worker } = require("worker_threads");

const [address, port, file] = process.argv.slice(2);
const GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"; // RFC 6455, section 1.3
let total = 0;

// Answers each number with its square; node does not wait for it, and neither does it end.
const worker = new Worker(
    `const { parentPort } = require("worker_threads");
     parentPort.on("message", (number) => parentPort.postMessage(number * number));`,
    { eval: true },
);
const waiting = [];
worker.on("message", (square) => waiting.shift()(square));
const square = (number) => new Promise((resolve) => { waiting.push(resolve); worker.postMessage(number); });

const answers = {
    // How often this connection has asked, and all together.
    "/count": async (request, response) => {
        request.socket.count = (request.socket.count || 0) + 1;
        response.end(`${request.socket.count} ${++total}`);
    },
    // The digest of what was sent, and the square of its length, from the thread.
    "/digest": async (request, response) => {
        const hash = crypto.createHash("sha256");
        let size = 0;
        for await (const piece of request) {
            hash.update(piece);
            size += piece.length;
        }
        response.end(`${hash.digest("hex")} ${await square(size)}`);
    },
    // Writes a line to the file and reads all of it, in the thread pool; the number of lines.
    "/file": async (request, response) => {
        await fs.promises.appendFile(file, "line\n");
        response.end(String((await fs.promises.readFile(file, "utf8")).split("\n").length - 1));
    },
    // A number every 20 ms, by a timer.
    "/events": async (request, response) => {
        let number = 0;
        response.writeHead(200, { "Content-Type": "text/event-stream" });
        const timer = setInterval(() => response.write(`data: ${++number}\n\n`), 20);
        response.on("close", () => clearInterval(timer));
    },
};

const server = http.createServer((request, response) => answers[request.url](request, response));
server.keepAliveTimeout = server.requestTimeout = server.headersTimeout = 0;

// A websocket that answers each short text with how many it has had.
server.on("upgrade", (request, socket) => {
    const key = crypto.createHash("sha1").update(request.headers["sec-websocket-key"] + GUID).digest("base64");
    socket.write(
        `HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ${key}\r\n\r\n`,
    );
    let pending = Buffer.alloc(0);
    let count = 0;
    socket.on("data", (data) => {
        pending = Buffer.concat([pending, data]);
        for (let size; pending.length >= 6 && pending.length >= (size = 6 + (pending[1] & 127)); ) {
            const mask = pending.subarray(2, 6);
            const text = Buffer.from(pending.subarray(6, size).map((byte, at) => byte ^ mask[at % 4])).toString();
            pending = pending.subarray(size);
            const answer = Buffer.from(`${++count} ${text}`);
            socket.write(Buffer.concat([Buffer.from([0x81, answer.length]), answer]));
        }
    });
    socket.on("error", () => socket.destroy());
});

server.listen(Number(port), address);
