"""Programs that show one use each; the tests run them."""
