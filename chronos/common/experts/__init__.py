"""The running path of experts: what is kept, what is read ahead, and how it is handed over."""
