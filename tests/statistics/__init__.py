# ruff: noqa: A005 - a package inside tests, which mirrors src; nothing imports it as a top-level module
