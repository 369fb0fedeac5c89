// A JVM service of the lab: 20 threads that each serve connections, and one that makes work for the collector.
// Arguments: address, port.

import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.io.OutputStream;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.security.MessageDigest;
import java.util.HexFormat;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.atomic.AtomicLong;

public class Server {
    static final int THREADS = 20;
    static final AtomicLong total = new AtomicLong();
    static final ConcurrentHashMap<String, Long> counts = new ConcurrentHashMap<>();
    static volatile byte[][] garbage;

    public static void main(String[] arguments) throws Exception {
        ServerSocket listener =
            new ServerSocket(Integer.parseInt(arguments[1]), 100, InetAddress.getByName(arguments[0]));
        Thread littering = new Thread(Server::litter, "littering");
        littering.setDaemon(true);
        littering.start();
        for (int number = 0; number < THREADS; number++) {
            new Thread(() -> serve(listener), "worker-" + number).start();
        }
    }

    static void litter() {
        try {
            while (true) {
                garbage = new byte[64][4096];
                Thread.sleep(5);
            }
        } catch (InterruptedException end) {
            return;
        }
    }

    // A connection after the other; each line is answered with this thread's name, how often it has answered this
    // connection, how often the line's key was asked for, how often anything was, and the digest of the line.
    static void serve(ServerSocket listener) {
        while (true) {
            try (Socket socket = listener.accept()) {
                socket.setTcpNoDelay(true);
                BufferedReader lines = new BufferedReader(new InputStreamReader(socket.getInputStream()));
                OutputStream out = socket.getOutputStream();
                long answered = 0;
                for (String line; (line = lines.readLine()) != null; ) {
                    long count = counts.merge(line.split(" ")[0], 1L, Long::sum);
                    byte[] digest = MessageDigest.getInstance("SHA-256").digest(line.getBytes());
                    String name = Thread.currentThread().getName();
                    String hex = HexFormat.of().formatHex(digest);
                    String answer =
                        String.format("%s %d %d %d %s%n", name, ++answered, count, total.incrementAndGet(), hex);
                    out.write(answer.getBytes());
                }
            } catch (Exception error) {
                System.err.println(error);
            }
        }
    }
}
