"""`smoothguard attack`: adversarial images of any questions for any model, as a data set of their own."""
