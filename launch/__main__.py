from draftsmith.launch.cli import main

main()
