"""The paper's tables and figures in miniature: arms are trained and asked, and a page sets them beside the paper's."""
