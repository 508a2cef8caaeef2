"""`python -m slmdeploy`: the command line without its console script."""

from slmdeploy.cli import main

main()
