"""Chat templates of the hub's folders, as far as it matters."""

from __future__ import annotations


def each(kind: str, written: str) -> str:
    return f"{{% for c in m['content'] | selectattr('type', 'equalto', '{kind}') %}}{written}{{% endfor %}}"


PICTURES, WORDS = each("image", "{{ '<image>\n' }}"), each("text", "{{ c['text'] }}")
SPACED = each("text", "{{ c['text'] + ' ' }}")
# Who speaks how, what ends a turn, who writes its BOS itself.
LLAVA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}{# pictures first #}"
    + PICTURES
    + "{% if m['role'] != 'assistant' %}"
    + SPACED
    + "{% else %}"
    + each("text", "{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}")
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATED = {
    "llava-1.5, bakLLaVA": LLAVA,
    "mistral": "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    + PICTURES
    + WORDS
    + "{{ ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'][0]['text'] + '</s> ' }}{% else %}"
    "{{ raise_exception('Only user and assistant!') }}{% endif %}{% endfor %}",
    "llava-1.6-34b": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    + PICTURES
    + WORDS
    + "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama-3, with BOS and trim": "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>' }}"
    + PICTURES
    + each("text", "{{ c['text'] | trim }}")
    + "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}\n\n",
    "TinyLLaVA": "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    + PICTURES
    + each("text", "{{ c['text'] + '\n' }}")
    + "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "the system's words": "A chat about what it is. What is it? {% for m in messages %}{{ m.role.upper() }}: "
    + PICTURES
    + SPACED
    + "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{{ 'ASSISTANT:' if add_generation_prompt }}",
    "parts in order": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% elif 'text' in c %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "a language model's": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
}
