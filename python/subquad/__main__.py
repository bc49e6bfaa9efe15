"""`python -m subquad`: the command line, and where C++ programs find the library."""

from subquad.cli import main

raise SystemExit(main())
