"""`python -m secateur` is the command `secateur`, for launchers such as torchrun that start modules."""

from secateur.cli import main

if __name__ == "__main__":
    main()
