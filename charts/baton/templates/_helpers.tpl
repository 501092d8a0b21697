{{/* Names, labels, images and the environment that several templates share. */}}

{{- define "baton.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Short enough that the longest name made of it, NAME-kvstore and a pod's suffix, is a DNS label. */}}
{{- define "baton.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "baton.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "baton.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "baton.selectorLabels" -}}
app.kubernetes.io/name: {{ include "baton.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "baton.labels" -}}
{{ include "baton.selectorLabels" . }}
app.kubernetes.io/part-of: baton
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Name, namespace and labels of an object of a component: dict "root" $ "component" "router", and
     "suffix" where it has several of a kind. */}}
{{- define "baton.metadata" -}}
name: {{ include "baton.fullname" .root }}-{{ .component }}{{ .suffix }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "baton.labels" . | nindent 2 }}
{{- end }}

{{- define "baton.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "baton.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* The image of a component: dict "root" $ "image" .Values.router.image. */}}
{{- define "baton.image" -}}
{{- $workers := ternary "baton-worker" "baton-worker-cpu" (eq .root.Values.device "cuda") }}
{{- $parts := list (dig "registry" .root.Values.image.registry .image) (.image.repository | default $workers) | compact }}
{{- if .image.digest }}
{{- printf "%s@%s" (join "/" $parts) .image.digest }}
{{- else }}
{{- printf "%s:%s" (join "/" $parts) (.image.tag | default .root.Values.image.tag | default .root.Chart.AppVersion) }}
{{- end }}
{{- end }}

{{/* A number as people write it: values files turn large ones into 2.1e+10. */}}
{{- define "baton.scalar" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) }}{{ printf "%.0f" . }}{{ else }}{{ toString . }}{{ end }}
{{- end }}

{{/* Settings as environment variables: {drainTimeoutS: 9} is BATON_DRAIN_TIMEOUT_S=9. */}}
{{- define "baton.settings" -}}
{{- range $name, $value := . }}
- name: BATON_{{ regexReplaceAll "[A-Z]" $name "_$0" | upper }}
  value: {{ include "baton.scalar" $value | quote }}
{{- end }}
{{- end }}

{{/* What every process is told. */}}
{{- define "baton.commonSettings" -}}
- name: BATON_METRICS_PORT
  value: "9090"
- name: BATON_LOG_LEVEL
  value: {{ .Values.logLevel }}
- name: BATON_LOG_FORMAT
  value: {{ .Values.logFormat }}
{{- with .Values.otlpEndpoint }}
- name: BATON_OTLP_ENDPOINT
  value: {{ . | quote }}
- name: BATON_TRACE_SHARE
  value: {{ $.Values.traceShare | quote }}
{{- end }}
{{- include "baton.settings" .Values.kvstore.config }}
{{- if include "baton.internalTlsSecretName" . }}
- name: BATON_INTERNAL_TLS_CERT
  value: /etc/baton/internal-tls/tls.crt
- name: BATON_INTERNAL_TLS_KEY
  value: /etc/baton/internal-tls/tls.key
- name: BATON_INTERNAL_TLS_CA
  value: /etc/baton/internal-tls/ca.crt
- name: BATON_REQUIRE_INTERNAL_TLS
  value: "true"
{{- end }}
{{- end }}

{{/* The Secret of a certificate: dict "root" $ "values" .Values.tls "path" "tls"; empty without TLS. */}}
{{- define "baton.certificate" -}}
{{- if and .values.existingSecret .values.certManager.enabled }}
{{- fail (printf "%s: give existingSecret or certManager, not both" .path) }}
{{- else if .values.certManager.enabled }}
{{- printf "%s-%s" (include "baton.fullname" .root) (kebabcase .path) }}
{{- else }}
{{- .values.existingSecret }}
{{- end }}
{{- end }}

{{- define "baton.tlsSecretName" -}}
{{- include "baton.certificate" (dict "root" . "values" .Values.tls "path" "tls") }}
{{- end }}

{{- define "baton.internalTlsSecretName" -}}
{{- include "baton.certificate" (dict "root" . "values" .Values.internalTls "path" "internalTls") }}
{{- end }}

{{/* Of every process: what it shows the others. */}}
{{- define "baton.internalTlsMount" -}}
{{- if include "baton.internalTlsSecretName" . }}
- {name: internal-tls, mountPath: /etc/baton/internal-tls, readOnly: true}
{{- end }}
{{- end }}

{{- define "baton.internalTlsVolume" -}}
{{- with include "baton.internalTlsSecretName" . }}
- name: internal-tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{/* How kubelet asks a gRPC server whether it is well: dict "root" $ "port" 50052 "path" "/ready". It has no
     certificate to show, so with internal TLS it asks beside the metrics. */}}
{{- define "baton.grpcProbe" -}}
{{- if include "baton.internalTlsSecretName" .root -}}
httpGet: {path: {{ .path }}, port: metrics}
{{- else -}}
grpc: {port: {{ .port }}}
{{- end }}
{{- end }}

{{- define "baton.modelSettings" -}}
- name: BATON_KVSTORE
  value: {{ include "baton.fullname" . }}-kvstore:50052
- name: BATON_MODEL
  value: {{ include "baton.modelFolder" . }}
- name: BATON_SERVED_MODEL_NAME
  value: {{ include "baton.modelId" . }}
{{- with .Values.model.maxModelLen }}
- name: BATON_MAX_MODEL_LEN
  value: {{ include "baton.scalar" . | quote }}
{{- end }}
{{- end }}

{{/* Where and as whom a pod runs: dict "root" $ "values" .Values.router; with "serviceAccountName" and "token" true
     as somebody else who may ask the Kubernetes API. */}}
{{- define "baton.podSpec" -}}
{{- $values := .values -}}
serviceAccountName: {{ .serviceAccountName | default (include "baton.serviceAccountName" .root) }}
automountServiceAccountToken: {{ .token | default false }}
{{- /* Else Kubernetes adds BATON_... variables, one for each Service, that are no settings. */}}
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName | default .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
securityContext:
  {{- $hardened := dict "runAsNonRoot" true "runAsUser" 65532 "runAsGroup" 65532 "fsGroup" 65532 "fsGroupChangePolicy" "OnRootMismatch" "seccompProfile" (dict "type" "RuntimeDefault") }}
  {{- mergeOverwrite $hardened (deepCopy ($values.podSecurityContext | default dict)) | toYaml | nindent 2 }}
{{- range $field := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with index $values $field }}
{{ $field }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{/* The container's own: dict "values" .Values.decode "capabilities" (list "IPC_LOCK"). */}}
{{- define "baton.containerSecurity" -}}
{{- $capabilities := dict "drop" (list "ALL") }}
{{- with .capabilities }}
{{- $_ := set $capabilities "add" . }}
{{- end }}
{{- $hardened := dict "allowPrivilegeEscalation" false "readOnlyRootFilesystem" true "capabilities" $capabilities }}
{{- mergeOverwrite $hardened (deepCopy (.values.securityContext | default dict)) | toYaml }}
{{- end }}

{{/* Labels and annotations of pods: dict "root" $ "component" "router" "values" .Values.router. */}}
{{- define "baton.podMetadata" -}}
{{- /* No versions here: a new chart alone is no reason to load models anew. */ -}}
labels:
  {{- include "baton.selectorLabels" . | nindent 2 }}
  app.kubernetes.io/part-of: baton
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $own := dict "kubectl.kubernetes.io/default-container" .component }}
{{- /* So that pods which read it at their start start anew when it changes. */}}
{{- if and (eq .component "kvstore") .root.Values.redis.url }}
{{- $_ := set $own "checksum/redis" (sha256sum .root.Values.redis.url) }}
{{- end }}
{{- $annotations := mergeOverwrite $own .root.Values.podAnnotations .values.podAnnotations }}
annotations:
  {{- toYaml $annotations | nindent 2 }}
{{- end }}

{{- define "baton.redisSecretName" -}}
{{- .Values.redis.existingSecret | default (printf "%s-redis" (include "baton.fullname" .)) }}
{{- end }}

{{/* Replicas, unless something else sets them. */}}
{{- define "baton.replicas" -}}
{{- if not (or .hpa.enabled .keda.enabled) -}}
replicas: {{ .replicas }}
{{- end }}
{{- end }}

{{/* An object that must not be empty: dict "map" .Values.tls.certManager.issuerRef "path" "tls.certManager.issuerRef". */}}
{{- define "baton.requiredMap" -}}
{{- if not .map }}
{{- fail (printf "%s is empty, and what it belongs to is enabled" .path) }}
{{- end }}
{{- toYaml .map }}
{{- end }}

{{/* A list that must not be empty: dict "list" .Values.ingress.hosts "path" "ingress.hosts". */}}
{{- define "baton.required" -}}
{{- if not .list }}
{{- fail (printf "%s is empty, and what it belongs to is enabled" .path) }}
{{- end }}
{{- toYaml .list }}
{{- end }}
