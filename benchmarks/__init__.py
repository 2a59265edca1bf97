"""The benchmark suite: geyamux and its peers on the same work, in the same run. README.md tells how to read it."""
