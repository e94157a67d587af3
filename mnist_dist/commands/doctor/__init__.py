"""What `mnist-dist doctor` looks at, and how it judges what it sees."""
