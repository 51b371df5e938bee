"""`python -m mobula.cli`."""

from mobula.cli import main

if __name__ == "__main__":
    main()
