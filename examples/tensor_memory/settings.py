"""Every setting of the examples of tensor memory, as a name of this module. Change it here."""

from pathlib import Path

from senri_hf import TensorMemoryHeadConfig


SEED = 0
ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "tensor_memory.json"
PAGE = ROOT / "docs" / "tensor_memory_results.md"
# Where `windows.py` leaves a model, a memory and questions for another process, and that one its answers.
FOLDER = ROOT / "checkpoints" / "tensor_memory"

WEIGHT_DECAY = 0.1
WARM_UP = 50

# Heads. What a fading head reads is nearly the last token; a slow one holds some ten, a lasting one everything.
FADING_16 = TensorMemoryHeadConfig(dim=16, eps=1e-6, use_delta_rule=False, decay=0.1)
SLOW_16 = TensorMemoryHeadConfig(dim=16, eps=1e-6, use_delta_rule=False, decay=0.9)
LASTING_32 = TensorMemoryHeadConfig(dim=32, eps=1e-6, use_delta_rule=False)
FADING_32 = TensorMemoryHeadConfig(dim=32, eps=1e-6, use_delta_rule=False, decay=0.1)

# English prose: the books that are trained on, the one that is not, and tokens by BPE.
TRAINING_BOOKS = ("doctor-moreau", "dubliners", "brother-jacob")
HELD_OUT_BOOK = "heart-of-darkness"
TEXT_VOCABULARY = 1024
TEXT_HIDDEN = 128
TEXT_INTERMEDIATE = 256
TEXT_HEADS = 4
TEXT_ROWS = 2
TEXT_WINDOW = 256
TEXT_STEPS = 600
TEXT_RATE = 3e-3
TEXT_TESTED = 30000
# A pair of tokens that the training books have at most so often is one that they do not tell.
TEXT_RARE = 5
# Rotary positions on all of a head, where GPT-NeoX has them on a quarter: a stronger baseline at this size.
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
DISTANCES = ((1, 5), (6, 20), (21, None))

# Associative recall, also between windows. A mixture of few and many pairs is learned many times faster than many.
RECALL_VOCABULARY = 32
RECALL_HIDDEN = 64
RECALL_INTERMEDIATE = 128
RECALL_HEADS = 4
RECALL_PAIRS = (2, 4, 8)
RECALL_ROWS = 32
RECALL_STEPS = 500
RECALL_RATES = (5e-3, 1e-3)
RECALL_TESTED = 512
WINDOW_STEPS = 300
WINDOW_RATE = 5e-3
# Documents of other pairs that are read between being told and being asked.
DOCUMENTS_BETWEEN = (0, 1, 2, 4)

# Order: two words of which one comes first, with noise around them. Of the pairs of words, some are never trained on.
ORDER_WORDS = 32
ORDER_NOISE = 8
ORDER_ASK = ORDER_WORDS + ORDER_NOISE
ORDER_VOCABULARY = ORDER_WORDS + ORDER_NOISE + 1
ORDER_GAPS = (2, 4, 3)
ORDER_HELD_OUT = 0.2
ORDER_STEPS = 300
ORDER_ROWS = 64
ORDER_RATE = 5e-3
# Texts with each pair in each order, with other noise, that the probe is fitted on and tested on.
PROBE_TEXTS = 6
PROBE_PENALTY = 100.0
