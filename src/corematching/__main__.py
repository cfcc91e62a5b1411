from corematching.cli.entry import main

main()
