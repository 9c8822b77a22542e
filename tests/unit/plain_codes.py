"""The codes of one matrix in plain operations: comparisons and selections, and padding to whole blocks."""

import torch

BLOCK = 64


def dither(first, rows, columns, offset):
    row, column = torch.arange(rows).unsqueeze(1) + first, torch.arange(columns)
    return ((row * 12664746 + column * 9560334 + offset) % 2**24).int()


def encode_bf16(values, first, offset):
    noise = dither(first, *values.shape, offset) >> 8
    return {"": ((values.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()}


def encode_int8(values, first, offset, signed):
    rows, columns = values.shape
    octaves, top = (16, 127) if signed else (32, 255)
    noise = blocked(dither(first, rows, columns, offset))
    signed_bits = blocked(values).view(torch.int32)
    bits = signed_bits & (2**31 - 1)
    scales = ((bits.amax(1, keepdim=True) + (2**20 - 1)) & -(2**23)).clamp(min=octaves << 23)
    base = (scales >> 20) - (octaves - 1) * 8
    share = bits.view(torch.float32) / ((base + 1) << 20).view(torch.float32) * 2**24
    low = (share + noise >= 2**24) if signed else bits > 0
    codes = torch.where(share < 2**24, low.int(), ((bits + (noise >> 4)) >> 20) - base).clamp(max=top)
    if signed:
        codes |= (signed_bits >> 24) & 128
    codes = codes.to(torch.uint8).view(-1, columns)[:rows]
    return {"": codes, "_scale": scales.view(torch.float32).squeeze(1)}


def decode_int8(stored, signed):
    codes, scales = stored[""], stored["_scale"]
    octaves, top = (16, 127) if signed else (32, 255)
    numbers = blocked(codes.int())
    level = numbers & top
    base = (scales.view(torch.int32).unsqueeze(1) >> 20) - (octaves - 1) * 8
    values = torch.where(level > 0, ((level + base) << 20).view(torch.float32), 0.0)
    return torch.where(numbers > top, -values, values).view(-1, codes.shape[1])[: len(codes)]


def blocked(matrix):
    rows, columns = matrix.shape
    padding = matrix.new_zeros(-rows % BLOCK, columns)
    return torch.cat([matrix, padding]).view(-(-rows // BLOCK), BLOCK, columns)
