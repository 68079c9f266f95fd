"""``python -m tilemla.codegen``."""

from tilemla.codegen.cli import main

if __name__ == "__main__":
    main(prog_name="tilemla")
