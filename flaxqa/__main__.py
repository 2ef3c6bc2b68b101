"""`python -m flaxqa` is `flaxqa`."""

from flaxqa.cli import main

if __name__ == "__main__":
    main()
