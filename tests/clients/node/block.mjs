// Decodes a TokenBlock (protos/fusion/v1/block.proto): raw little-endian columns, T rows, K candidates per row.

/** IEEE 754 half precision, as Node has no Float16Array yet. */
function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** The largest number of an id's type stands for padding: -1 here. */
function idOf(value, padding) {
  return value === padding ? -1 : value;
}

const READERS = {
  int32: [4, (bytes, at) => bytes.readInt32LE(at)],
  uint16: [2, (bytes, at) => idOf(bytes.readUInt16LE(at), 0xffff)],
  uint24: [3, (bytes, at) => idOf(bytes.readUIntLE(at, 3), 0xffffff)],
  uint32: [4, (bytes, at) => idOf(bytes.readUInt32LE(at), 0xffffffff)],
  float32: [4, (bytes, at) => bytes.readFloatLE(at)],
  float16: [2, (bytes, at) => halfToNumber(bytes.readUInt16LE(at))],
  uint8: [1, (bytes, at) => bytes.readUInt8(at)],
};
const DTYPES = { LOGPROB_DTYPE_FLOAT16: "float16", LOGPROB_DTYPE_FLOAT32: "float32" };

const ID_DTYPES = { ID_DTYPE_UINT16: "uint16", ID_DTYPE_UINT24: "uint24", ID_DTYPE_UINT32: "uint32" };

function column(block, name, type, length) {
  const [size, read] = READERS[type];
  const bytes = block[name];
  if (bytes.length !== length * size) {
    throw new Error(`${name}: ${bytes.length} bytes, expected ${length} x ${size}`);
  }
  return Array.from({ length }, (_, index) => read(bytes, index * size));
}

/** All columns as arrays; throws when a length, the dtype or the probability mass of a row is not as promised. */
export function decodeBlock(block) {
  const { num_tokens: T, k: K } = block;
  const dtype = DTYPES[block.dtype];
  if (!dtype) throw new Error(`dtype: unknown value ${block.dtype}`);
  const idType = ID_DTYPES[block.id_dtype];
  if (!idType) throw new Error(`id_dtype: unknown value ${block.id_dtype}`);
  const decoded = {
    text: block.text.toString("utf8"),
    token_ids: column(block, "token_ids", idType, T),
    byte_ends: column(block, "byte_ends", "int32", T),
    topk_ids: column(block, "topk_ids", idType, T * K),
    topk_logprobs: column(block, "topk_logprobs", dtype, T * K),
    tail: column(block, "tail", "float32", T),
    gold: column(block, "gold", "float32", T),
    mask: block.mask.length ? column(block, "mask", "uint8", T) : Array(T).fill(1),
    dtype,
    T,
    K,
  };
  if (T > 0 && decoded.byte_ends[T - 1] !== block.text.length) {
    throw new Error(`byte_ends: the last is ${decoded.byte_ends[T - 1]}, the text has ${block.text.length} bytes`);
  }
  for (let row = 0; row < T; row += 1) {
    const mass = rowMass(decoded, row);
    if (decoded.mask[row] && Math.abs(mass - 1) > 0.01) throw new Error(`topk_logprobs: row ${row} sums to ${mass}`);
  }
  return decoded;
}

/** The candidates of a row, most probable first, without padding. */
export function candidates({ topk_ids, topk_logprobs, K }, row) {
  return Array.from({ length: K }, (_, index) => row * K + index)
    .filter((at) => topk_ids[at] >= 0)
    .map((at) => ({ id: topk_ids[at], logprob: topk_logprobs[at] }));
}

/** Probability of the row's candidates and its tail together. */
export function rowMass(decoded, row) {
  return candidates(decoded, row).reduce((sum, { logprob }) => sum + Math.exp(logprob), Math.exp(decoded.tail[row]));
}
