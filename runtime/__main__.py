"""``python -m tilemla`` is the command ``tilemla``."""

from tilemla.cli import main

if __name__ == "__main__":
    main(prog_name="tilemla")
