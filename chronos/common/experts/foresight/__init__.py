"""What is believed about the experts of the next tokens, and the policies made of it."""
