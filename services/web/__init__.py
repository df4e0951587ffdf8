"""Pages for people: a text with what each source said about every token."""
