"""Arrays in, arrays out: products, roots, polar factors, eigenbases."""
