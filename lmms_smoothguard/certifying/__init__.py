"""`smoothguard certify`: certificates of the pictures and questions of a data set, with their table and curves."""
