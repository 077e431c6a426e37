from sliplm.cli import main

main()
