"""The pattern service with all its memory in one anonymous shared mapping, as PostgreSQL has its shared_buffers."""

from __future__ import annotations

import mmap

from labs.programs import pattern_server
from labs.programs.ballast import Ballast


def main() -> None:
    options = pattern_server.arguments().parse_args()
    size_bytes = options.memory_mb * pattern_server.MEGABYTE
    pattern_server.serve(options, lambda: Ballast(size_bytes, mmap.MAP_SHARED))


if __name__ == "__main__":
    main()
