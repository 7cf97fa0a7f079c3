"""Chat formats of the published chat models, as Jinja templates.

Used where a checkpoint's tokenizer brings none. Not covered: chat models of others; theirs
come with the tokenizer.
"""

import re

# FastChat's vicuna turns, without its system sentence.
# Source: lm-sys/FastChat, fastchat/conversation.py, `vicuna_v1.1`.
VICUNA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# Source: the model card of CLEX-Mixtral-8x7B-Chat-32k.
ZEPHYR = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# Source: LhLi-QED/GeNE at cd27b18, its instruction data: turns of "user: ", text,
# "\n\nassistant: ", answer and </s>, after one <s>.
GENE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}"
    "{{ 'user: ' + message['content'] + '\\n\\nassistant: ' }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
)

TEMPLATES = {
    r"clex-7b-chat": VICUNA,
    r"clex-mixtral-8x7b-chat": ZEPHYR,
    r"llama2-gene-64k-chat": GENE,
}


def template_for(name: str) -> str | None:
    """The chat template of a published checkpoint, by its hub id or folder name.

    Args:
        name: for example "DAMO-NLP-SG/CLEX-7B-Chat-16K".

    Returns:
        A Jinja template, or None where the name is not one of the chat models.
    """
    for pattern, template in TEMPLATES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return template
    return None
