"""What TRL's model cards say of a routed run: its name, its paper and a tag.

Two papers are cited: gradient routing's, and the one that TRL cites for GRPO.
"""

import textwrap

from trl.trainer.grpo_trainer import GRPOTrainer

NAME = "GRPO with gradient routing"
TAG = "gradient-routing"
PAPER = {
    "title": "Gradient Routing: Masking Gradients to Localize Computation in Neural Networks",
    "id": "2410.04332",
    "citation": textwrap.dedent("""\
        @article{cloud2024gradient,
            title        = {{Gradient Routing: Masking Gradients to Localize Computation in Neural Networks}},
            author       = {Alex Cloud and Jacob Goldman-Wetzler and Evžen Wybitul and Joseph Miller and
                            Alexander Matt Turner},
            year         = 2024,
            eprint       = {arXiv:2410.04332},
        }

        """)
    + GRPOTrainer._paper["citation"],
}
