"""ask.py LIBRARY PACKAGE PICTURE QUESTION: another language that calls csrc/runtime/minifocus_c.h."""

import ctypes
import sys
from pathlib import Path

library, package, picture, question = sys.argv[1:]
c = ctypes.CDLL(library)
for name in ("open", "request_new", "ask_encoded"):
    getattr(c, f"minifocus_{name}").restype = ctypes.c_void_p
c.minifocus_error.restype = c.minifocus_answer_text.restype = ctypes.c_char_p
model = c.minifocus_open(package.encode(), 1, 0) or sys.exit(c.minifocus_error().decode())
request, content = c.minifocus_request_new(question.encode()), Path(picture).read_bytes()
size = ctypes.c_size_t(len(content))
answer = c.minifocus_ask_encoded(ctypes.c_void_p(model), content, size, ctypes.c_void_p(request))
print(c.minifocus_answer_text(ctypes.c_void_p(answer or sys.exit(c.minifocus_error().decode()))).decode())
