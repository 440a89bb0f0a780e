"""What there is to distil: rows, teacher, student, and what a way to distil has to be."""
