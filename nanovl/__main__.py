"""`python -m nanovl` is the nanovl command."""

from nanovl.cli import main

raise SystemExit(main())
