from merge3_server.cli import main

main()
