// Asks a running cluster over gRPC from Node, with the proto loaded at run time:
//   cd examples/node && npm ci && npm start

import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const address = process.env.GRPC_ADDRESS ?? "127.0.0.1:50051";
const protos = fileURLToPath(new URL("../../protos", import.meta.url));

const definition = protoLoader.loadSync("baton/v1/inference.proto", {
  includeDirs: [protos],
  longs: Number,
  defaults: true,
});
const { baton } = grpc.loadPackageDefinition(definition);
const inference = new baton.v1.Inference(address, grpc.credentials.createInsecure());

const { models } = await new Promise((resolve, reject) =>
  inference.listModels({}, { deadline: Date.now() + 10_000 }, (error, reply) =>
    error ? reject(error) : resolve(reply),
  ),
);
console.log(`${models[0].id}, up to ${models[0].maxModelLen} tokens`);

const stream = inference.generate(
  {
    model: models[0].id,
    text: "def read_lines(path):",
    sampling: { maxTokens: 24, temperature: 0 },
  },
  { deadline: Date.now() + 60_000 },
);
for await (const response of stream) {
  process.stdout.write(response.text);
  if (response.usage) {
    console.log(`\nusage: ${response.usage.promptTokens} + ${response.usage.completionTokens} tokens`);
  }
}
inference.close();
