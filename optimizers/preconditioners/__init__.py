"""State and steps of Shampoo, SOAP and KL-Shampoo for the blocks of every leaf."""
