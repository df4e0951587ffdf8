// Asks a server for its protos: gRPC server reflection, v1 or v1alpha, whichever it has.

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import protobuf from "protobufjs";

// The part of grpc/reflection/*/reflection.proto that is needed here; both versions have the same messages.
const REFLECTION = (version) => `
  syntax = "proto3";
  package grpc.reflection.${version};
  service ServerReflection {
    rpc ServerReflectionInfo(stream ServerReflectionRequest) returns (stream ServerReflectionResponse);
  }
  message ServerReflectionRequest {
    oneof message_request { string file_by_filename = 3; string file_containing_symbol = 4; }
  }
  message ServerReflectionResponse {
    oneof message_response { FileDescriptorResponse file_descriptor_response = 4; ErrorResponse error_response = 7; }
  }
  message FileDescriptorResponse { repeated bytes file_descriptor_proto = 1; }
  message ErrorResponse { int32 error_code = 1; string error_message = 2; }
`;
const FILE = protobuf.parse(`syntax = "proto3"; message File { string name = 1; repeated string dependency = 3; }`).root
  .lookupType("File");

/** One request, one answer: the encoded FileDescriptorProtos. */
function ask(client, metadata, request) {
  return new Promise((resolve, reject) => {
    const call = client.ServerReflectionInfo(metadata);
    call.on("data", (answer) => {
      if (answer.error_response) reject(new Error(`reflection: ${answer.error_response.error_message}`));
      else resolve(answer.file_descriptor_response.file_descriptor_proto);
      call.end();
    });
    call.on("error", reject);
    call.write(request);
  });
}

/** Encodes a FileDescriptorSet: every file as field 1. */
function descriptorSet(files) {
  const writer = protobuf.Writer.create();
  for (const file of files) writer.uint32(10).bytes(file);
  return Buffer.from(writer.finish());
}

/** The package definition of `symbol` and of everything it imports, and the reflection version that gave it. */
export async function loadByReflection(address, metadata, symbol, options) {
  let lastError;
  for (const version of ["v1", "v1alpha"]) {
    const definition = protoLoader.fromJSON(protobuf.parse(REFLECTION(version), { keepCase: true }).root.toJSON());
    const { ServerReflection } = grpc.loadPackageDefinition(definition).grpc.reflection[version];
    const client = new ServerReflection(address, grpc.credentials.createInsecure());
    try {
      const files = new Map();
      const take = (encoded) => encoded.forEach((bytes) => files.set(FILE.decode(bytes).name, bytes));
      take(await ask(client, metadata, { file_containing_symbol: symbol }));
      for (let missing = true; missing; ) {
        missing = [...files.values()].flatMap((bytes) => FILE.decode(bytes).dependency).find((name) => !files.has(name));
        if (missing) take(await ask(client, metadata, { file_by_filename: missing }));
      }
      return { version, definition: protoLoader.loadFileDescriptorSetFromBuffer(descriptorSet(files.values()), options) };
    } catch (error) {
      lastError = error;
      if (error.code !== grpc.status.UNIMPLEMENTED) break;
    } finally {
      client.close();
    }
  }
  throw lastError;
}
