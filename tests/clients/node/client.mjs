// Fuses one text: node client.mjs ADDRESS --text TEXT [--k N] [--dtype float16|float32]
//     [--application NAME] [--token BEARER_TOKEN] [--protos DIR]
// Finds the API through server reflection, or in DIR. Prints one line of JSON with the candidates of the last row.

import { parseArgs } from "node:util";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import { candidates, decodeBlock, rowMass } from "./block.mjs";
import { loadByReflection } from "./reflection.mjs";

const OPTIONS = { keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };
const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    text: { type: "string" },
    k: { type: "string" },
    dtype: { type: "string", default: "float16" },
    application: { type: "string", default: "fusion" },
    token: { type: "string" },
    protos: { type: "string" },
  },
});
const address = positionals[0];
if (!address || values.text === undefined) {
  console.error("usage: node client.mjs ADDRESS --text TEXT [--k N] [--protos DIR] ...");
  process.exit(2);
}

const metadata = new grpc.Metadata();
metadata.set("application", values.application);
if (values.token) metadata.set("authorization", `Bearer ${values.token}`);

async function load() {
  if (!values.protos) return loadByReflection(address, metadata, "fusion.v1.FusionService", OPTIONS);
  const options = { ...OPTIONS, includeDirs: [values.protos] };
  return { version: "protos", definition: await protoLoader.load("fusion/v1/fusion.proto", options) };
}

function fuse(client, request) {
  const deadline = Date.now() + 120_000;
  return new Promise((resolve, reject) => {
    client.Fuse(request, metadata, { deadline }, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

try {
  const { version, definition } = await load();
  const { FusionService } = grpc.loadPackageDefinition(definition).fusion.v1;
  const client = new FusionService(address, grpc.credentials.createInsecure(), {
    "grpc.max_receive_message_length": -1,
  });
  const request = { texts: [Buffer.from(values.text, "utf8")], dtype: `LOGPROB_DTYPE_${values.dtype.toUpperCase()}` };
  if (values.k !== undefined) request.k = Number(values.k);
  const { blocks } = await fuse(client, request);
  client.close();
  if (blocks.length !== 1) throw new Error(`blocks: ${blocks.length} for one text`);
  const block = decodeBlock(blocks[0]);
  if (block.text !== values.text) throw new Error("text: the block holds another one");
  const last = block.T - 1;
  console.log(
    JSON.stringify({
      api: version,
      vocabulary: blocks[0].vocabulary,
      num_tokens: block.T,
      k: block.K,
      dtype: block.dtype,
      sources: blocks[0].shares.map(({ name, present, weight }) => ({ name, present, weight })),
      last_token_id: block.token_ids[last],
      last_gold_logprob: block.gold[last],
      last_mass: rowMass(block, last),
      top: candidates(block, last).slice(0, 5),
    }),
  );
} catch (error) {
  const status = Object.keys(grpc.status).find((name) => grpc.status[name] === error.code);
  console.error(JSON.stringify({ error: status ?? error.name, message: error.details ?? error.message }));
  process.exitCode = 1;
}
