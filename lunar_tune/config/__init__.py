"""What users tell the program: every option, without torch."""
