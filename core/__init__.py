"""The ground floor: every other package imports it, and it imports none of them."""
