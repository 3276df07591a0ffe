"""The command `v2m`: one module a subcommand, each with `add_parser(subparsers)` and
`run(arguments) -> int`."""
