"""`python -m labs.benchmarks`, which labs/bench runs."""

from labs.benchmarks.cli import main

if __name__ == "__main__":
    main()
