"""Packages named apex, written as files: NVIDIA's with a stand-in for its kernels, and the one on PyPI."""

from __future__ import annotations

KERNEL = '''
"""multi_tensor_adam as csrc/multi_tensor_adam.cu of NVIDIA/apex has it: scalars and arithmetic in fp32."""
import torch

launches = []


def fp32(number):
    return torch.tensor(number, dtype=torch.float32)


def multi_tensor_adam(chunk_size, noop_flag, lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, decay):
    assert isinstance(chunk_size, int) and noop_flag.dtype == torch.int32 and len(lists) == 4
    assert len({len(tensors) for tensors in lists}) == 1 and lists[0]
    launches.append((step, len(lists[0])))
    correction1 = correction2 = fp32(1.0)
    lr, beta1, beta2, epsilon, decay = map(fp32, (lr, beta1, beta2, epsilon, decay))
    if bias_correction == 1:  # the power of a float and an int is a double in C++
        correction1, correction2 = fp32(1 - beta1.item() ** step), fp32(1 - beta2.item() ** step)
    for g, p, m, v in zip(*lists):
        assert all(x.is_contiguous() and x.numel() == g.numel() > 0 for x in (g, p, m, v))
        if mode == 0:
            g = g + decay * p
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        update = (m / correction1) / ((v / correction2).sqrt() + epsilon)
        p.sub_(lr * (update + decay * p if mode == 1 else update))
'''
APPLIER = """
class MultiTensorApply:
    def __init__(self, chunk_size):
        self.chunk_size = chunk_size

    def __call__(self, op, noop_flag_buffer, tensor_lists, *args):
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)
"""


def write_files(folder, files):
    """Write texts to files, given by their paths below ``folder``."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def write_nvidia_apex(folder, kernel=KERNEL, init="from . import optimizers"):
    """Write NVIDIA's package; ``kernel`` is the text in place of its compiled module."""
    write_files(
        folder,
        {
            "apex/__init__.py": init,
            "apex/optimizers/__init__.py": "class FusedAdam: pass",
            "apex/multi_tensor_apply/__init__.py": APPLIER,
            "apex-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: apex\nVersion: 0.1\n",
            "amp_C.py": kernel,
        },
    )


def write_pypi_apex(folder):
    """Write the package of that name on PyPI, which belongs to the framework Pyramid and needs modules of it."""
    write_files(
        folder,
        {
            "apex/__init__.py": "import pyramid_mailer",
            "apex/models.py": "",
            "apex-0.9.10.dev0.dist-info/METADATA": "Metadata-Version: 1.1\nName: apex\nVersion: 0.9.10.dev0\n",
        },
    )
