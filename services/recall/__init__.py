"""Key blocks of long texts: the judge that finds them, its training and its evaluation."""
