"""What every layer above shares: the records of a call, the arithmetic of O(N D), and the validation of arguments."""
