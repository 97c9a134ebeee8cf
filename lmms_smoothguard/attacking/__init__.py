"""`smoothguard attack`: adversarial images and sounds of any questions for any model, as a data set of their own."""
