"""One's own pictures, searched by words: in the terminal, and on a page where the towers run in the browser."""
