"""The command `mnist-dist doctor`: check whether these processes can train together."""
