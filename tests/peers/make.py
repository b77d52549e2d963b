"""What the peers measure: random weights of Phi-3.5-vision's shapes in their formats.

make.py FOLDER writes text-q4_0.gguf and text-q4_k_m.gguf (llama.cpp), vit-f32.onnx and vit-int8.onnx (ONNX Runtime), once.
"""

import sys
from pathlib import Path

import numpy as np

WIDTH, LAYERS, HEADS, HIDDEN, VOCABULARY = 3072, 32, 32, 8192, 32064
CLIP_WIDTH, CLIP_HEADS, CLIP_HIDDEN, CLIP_POSITIONS = 1024, 16, 4096, 577
CLIP_LAYERS = 23  # the model takes the features before the last of 24


def text_f16(path):
    """A phi3 GGUF in f16; the tokens are made up, only their ids are used."""
    from gguf import GGMLQuantizationType as Type
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "phi3")
    writer.add_context_length(131072)
    writer.add_rope_scaling_orig_ctx_len(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_scaling_attn_factors(1.1902380714238083)
    writer.add_file_type(1)
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [f"t{index}" for index in range(len(tokens), VOCABULARY)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(VOCABULARY)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (VOCABULARY - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    tensors = [("token_embd.weight", (VOCABULARY, WIDTH)), ("output_norm.weight", (WIDTH,)), ("output.weight", (VOCABULARY, WIDTH))]
    tensors += [("rope_factors_long.weight", (48,)), ("rope_factors_short.weight", (48,))]
    for layer in range(LAYERS):
        name = f"blk.{layer}."
        tensors += [(name + "attn_norm.weight", (WIDTH,)), (name + "ffn_norm.weight", (WIDTH,))]
        tensors += [(name + "attn_qkv.weight", (3 * WIDTH, WIDTH)), (name + "attn_output.weight", (WIDTH, WIDTH))]
        tensors += [(name + "ffn_up.weight", (2 * HIDDEN, WIDTH)), (name + "ffn_down.weight", (WIDTH, HIDDEN))]
    for name, shape in tensors:
        of = (np.float16, Type.F16) if len(shape) == 2 else (np.float32, Type.F32)
        writer.add_tensor_info(name, list(shape), np.dtype(of[0]), int(np.prod(shape)) * np.dtype(of[0]).itemsize, of[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # Enough numbers for the largest matrix from any of the places it starts at; so many anew for each would take minutes.
    pool = (np.random.default_rng(0).standard_normal(1 << 27, dtype=np.float32) * 0.02).astype(np.float16)
    for index, (_, shape) in enumerate(tensors):
        size = int(np.prod(shape))
        start = index * 7919 * 32 % (pool.size - size)
        writer.write_tensor_data(pool[start : start + size].reshape(shape) if len(shape) == 2 else np.ones(shape, np.float32))
    writer.close()


def text(folder):
    import llama_cpp

    wanted = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}
    wanted = {folder / f"text-{name}.gguf": form for name, form in wanted.items() if not (folder / f"text-{name}.gguf").exists()}
    if not wanted:
        return
    source = folder / "text-f16.gguf"
    text_f16(source)
    for target, form in wanted.items():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = form, 2
        partial = target.with_suffix(".part")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), parameters) != 0:
            sys.exit(f"llama.cpp does not quantize {source}")
        partial.rename(target)
    source.unlink()


class Graph:
    """An ONNX graph that grows node by node."""

    def __init__(self):
        self.random, self.nodes, self.weights, self.names = np.random.default_rng(0), [], [], 0

    def constant(self, values):
        from onnx import numpy_helper

        self.names += 1
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(values), f"w{self.names}"))
        return f"w{self.names}"

    def weight(self, *shape):
        return self.constant(self.random.standard_normal(shape, dtype=np.float32) * 0.02)

    def node(self, operation, *inputs, **attributes):
        from onnx import helper

        self.names += 1
        self.nodes.append(helper.make_node(operation, list(inputs), [f"n{self.names}"], **attributes))
        return f"n{self.names}"

    def norm(self, x):
        ones, zeros = self.constant(np.ones(CLIP_WIDTH, np.float32)), self.constant(np.zeros(CLIP_WIDTH, np.float32))
        return self.node("LayerNormalization", x, ones, zeros, axis=-1, epsilon=1e-5)

    def linear(self, x, columns, rows):
        return self.node("Add", self.node("MatMul", x, self.weight(columns, rows)), self.weight(rows))

    def layer(self, x, split, merged):
        y = self.norm(x)
        query, key, value = (self.node("Reshape", self.linear(y, CLIP_WIDTH, CLIP_WIDTH), split) for _ in range(3))
        query = self.node("Mul", query, self.constant(np.float32((CLIP_WIDTH // CLIP_HEADS) ** -0.5)))
        query = self.node("Transpose", query, perm=[0, 2, 1, 3])
        key = self.node("Transpose", key, perm=[0, 2, 3, 1])
        value = self.node("Transpose", value, perm=[0, 2, 1, 3])
        chances = self.node("Softmax", self.node("MatMul", query, key), axis=-1)
        heads = self.node("Transpose", self.node("MatMul", chances, value), perm=[0, 2, 1, 3])
        x = self.node("Add", x, self.linear(self.node("Reshape", heads, merged), CLIP_WIDTH, CLIP_WIDTH))
        y = self.linear(self.norm(x), CLIP_WIDTH, CLIP_HIDDEN)
        gate = self.node("Sigmoid", self.node("Mul", y, self.constant(np.float32(1.702))))
        return self.node("Add", x, self.linear(self.node("Mul", y, gate), CLIP_HIDDEN, CLIP_WIDTH))


def tower(folder):
    import onnx
    from onnx import TensorProto, helper
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole, rounded = folder / "vit-f32.onnx", folder / "vit-int8.onnx"
    if whole.exists() and rounded.exists():
        return
    graph = Graph()
    split = graph.constant(np.array([1, CLIP_POSITIONS, CLIP_HEADS, -1], np.int64))
    merged = graph.constant(np.array([1, CLIP_POSITIONS, CLIP_WIDTH], np.int64))
    patches = graph.node("Conv", "pixels", graph.weight(CLIP_WIDTH, 3, 14, 14), strides=[14, 14], kernel_shape=[14, 14])
    patches = graph.node("Reshape", patches, graph.constant(np.array([1, CLIP_WIDTH, -1], np.int64)))
    patches = graph.node("Transpose", patches, perm=[0, 2, 1])
    x = graph.node("Concat", graph.weight(1, 1, CLIP_WIDTH), patches, axis=1)
    x = graph.norm(graph.node("Add", x, graph.weight(1, CLIP_POSITIONS, CLIP_WIDTH)))
    for _ in range(CLIP_LAYERS):
        x = graph.layer(x, split, merged)
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3, 336, 336])
    features = helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, CLIP_POSITIONS, CLIP_WIDTH])
    made = helper.make_graph(graph.nodes, "vit", [pixels], [features], graph.weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save_model(model, whole)
    quantize_dynamic(
        whole, rounded, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    text(folder)
    tower(folder)
