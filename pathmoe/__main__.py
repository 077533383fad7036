# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""`python -m pathmoe` is the command `pathmoe`."""

from .cli import main


if __name__ == "__main__":
    main()
