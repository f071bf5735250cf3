"""Row work on the products of a student's and a teacher's head: kernels and their launches."""
