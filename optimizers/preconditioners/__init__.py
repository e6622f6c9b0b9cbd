"""What Shampoo, SOAP and KL-Shampoo keep and do for the blocks of every leaf."""
