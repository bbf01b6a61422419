"""What a search shows on the terminal and writes into its log."""
