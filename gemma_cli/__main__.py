"""`python -m gemma_cli`"""

from gemma_cli.cli.main import main

main()
