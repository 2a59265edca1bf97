"""The programs that are measured, each a server and a driver; README.md has the contract that they share."""
